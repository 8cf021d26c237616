"""The API over HTTP: OpenAI's shapes in front of the gateway.

rest.py     the FastAPI application
schemas.py  request and response bodies, and the messages that they become
errors.py   the one table of errors -> HTTP answers
"""
