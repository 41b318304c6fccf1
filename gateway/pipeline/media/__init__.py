"""Images, audio and video that requests bring: found, weighed, and fetched where that is allowed."""
