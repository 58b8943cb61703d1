"""What KVM runs on: threads, the scheduler, locks, TSO memory. Nothing here knows about shadow paging."""
