"""The hypervisor under test, file by file as the kernel names it. See docs/architecture.md for the map."""
