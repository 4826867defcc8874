"""Model families: what each calls its config keys and tensors, one small table each."""
