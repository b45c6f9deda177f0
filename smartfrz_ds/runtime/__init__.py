"""The loop: the controller, the freezer and the policy's stage."""
