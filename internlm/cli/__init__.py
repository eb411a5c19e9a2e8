"""The console command ``internlm``."""
