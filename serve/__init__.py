"""The Ray Serve application: `serve run serve.app:build checkpoint=DIR` from the repository root."""
