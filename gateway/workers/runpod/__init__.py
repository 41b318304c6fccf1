"""Jobs from RunPod's queue, by the parts of its SDK, on our loop."""
