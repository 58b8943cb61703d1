"""mmufuzz: a property-based fuzzing harness for x86 shadow paging."""
