"""The other doors: NATS JetStream, and RunPod's queue. Each is imported only where it is used."""
