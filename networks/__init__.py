"""What users type after --network_module."""
