"""A subnet beside the full posterior.

May import guides.
"""
