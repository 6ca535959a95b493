"""The parts of the HTTP service.

Filters of what goes in and comes out: folding (what a text says, however it is written), then filters. The chat page:
static_page serves the files in page/.
"""
