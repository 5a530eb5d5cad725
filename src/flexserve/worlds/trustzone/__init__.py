"""The trustzone world: Flex-Monitor as real firmware on an emulated Arm machine. So far: the machine and the attacks on it."""
