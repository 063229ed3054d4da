"""Reading files of ``torch.save`` without running what is in them."""
