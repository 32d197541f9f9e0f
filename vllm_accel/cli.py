"""`vllm-accel`: train heads."""
def main():
    pass
