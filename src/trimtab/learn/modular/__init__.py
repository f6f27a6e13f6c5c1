"""Parts of a network trained apart, or locally, and put together."""
