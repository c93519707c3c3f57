"""Generation: `engine.Engine` takes `request.Request`s and gives token events. It knows nothing of HTTP.

Nothing is imported here, so that who only speaks to an engine (`request.py`) need not load torch.
"""
