"""The commands of `vllm-glm-patch`, one module or folder a command; each offers `command` for typer to register."""
