"""Options are refused before anything is deployed, with the way out."""
