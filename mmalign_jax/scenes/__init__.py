"""The built-in image world: rendered pictures with exact truth, texts about them, and a language prior that makes models hallucinate."""
