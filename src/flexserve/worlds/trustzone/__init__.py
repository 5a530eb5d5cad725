"""The trustzone world: Flex-Monitor as firmware on an emulated Arm machine. So far: the machine, and attacks."""
