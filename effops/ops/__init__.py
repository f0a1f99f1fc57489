"""One room per operator: `effops/ops/<op>` holds its fakes, its `torch.autograd.Function` and its reference."""
