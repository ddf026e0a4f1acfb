"""Text in, text out: the tokenizer and chat template, the loop that samples, conversations that last."""
