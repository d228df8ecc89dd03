"""What gateways may share: answers that are kept, and how much each key uses; in this process, or in a Redis."""
