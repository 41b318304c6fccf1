"""What a hop through Corral costs, measured side by side with other proxies: `./scripts/bench`."""
