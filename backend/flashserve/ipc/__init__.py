"""The socket between the stub and the engine process, and the supervisor that keeps an engine alive."""
