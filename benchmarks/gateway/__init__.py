"""What the gateway costs: beside straight gRPC, and in front of an engine that costs nothing."""
