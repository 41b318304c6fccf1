"""The API described, beside the code that serves it: `/openapi.json`, and `/docs`, a page that shows it."""
