"""The training workflow: build once in one legal order, then step, record, save, preview until the last step."""
