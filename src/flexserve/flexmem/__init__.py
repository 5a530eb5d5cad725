"""Flex-Mem on linux: a userfaultfd arena that is filled on arrival and recalled page by page."""
