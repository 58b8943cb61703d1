"""mmufuzz: a property-based fuzzing harness for x86 shadow paging.

Importing it settles which core is used: compiled or pure Python (``mmufuzz.build.loader``).
"""

from mmufuzz.build import loader as _loader

_loader.choose()
