"""Jobs from a JetStream work queue: `worker` takes them, `work` does one, `ask` is the other side (`corral chat`)."""
