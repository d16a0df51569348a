from gpt2_flax.cli import main

if __name__ == "__main__":
    main()
