"""The three builds of the core: pure Python, compiled, and compiled with coverage instrumentation.

Nothing here imports another room, and no core module imports this one. See docs/architecture.md for the map.
"""
