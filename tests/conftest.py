"""Puts this folder on `sys.path`, for the helpers that several test folders share."""
