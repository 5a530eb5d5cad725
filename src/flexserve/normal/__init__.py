"""The normal world's own work: how much memory the secure world may hold, as the operating system's needs change."""
