"""Names of the Hugging Face Hub in place of folders: what they mean, what is downloaded of them, and what is pushed there."""
