"""From a pretrained model to one that follows instructions and preferences; one file an algorithm."""
