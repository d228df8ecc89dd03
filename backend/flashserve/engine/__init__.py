"""The engine: scheduler and runner in one loop, in a process of its own or inside the caller's."""
