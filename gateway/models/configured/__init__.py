"""From models files and folders to what is configured."""
