"""What a user asks for, as frozen values: the only reader of TOML files, prompt files and command lines."""
