"""What several gateways hold in common, in Redis: limits and usage; and what to do while it is away."""
