"""Workers, one for each engine; a peer's runs in the peer's environment, so it needs the standard library only."""
