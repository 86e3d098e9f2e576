"""HTTP server for one bundle, with the API of OpenAI's completions. Needs the extra `serve`."""
