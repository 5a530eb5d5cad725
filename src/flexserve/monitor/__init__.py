"""The Flex-Monitor seen from Python: its interface, the reference model of its page states."""
