"""Text and tokens: the tokenizer, text from tokens one by one, and files of conversations.

No arrays on devices belong here.
"""
