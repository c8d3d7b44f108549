"""``qaroma page``: the commands as one window in a browser, for people who do not like terminals.

The page only runs commands, which it shows; a run is a process of its own, and outlives the page. It is built on
Starlette and uvicorn: two packages of 2 MB, pages that jinja2 writes on the server, and a hundred lines of script for
what HTML alone cannot do. So the policy sent with every page forbids all script but that file, and there is no
websocket. NiceGUI 3 brings more, in 105 MB and 49 packages with all that it needs; its pages are put together in the
browser by Vue, over a websocket, which such a policy would stop.
"""
