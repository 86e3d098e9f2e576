"""The server of a bundle: OpenAI's completions over HTTP, from one engine. Needs the extra `serve`."""
