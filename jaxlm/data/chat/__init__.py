"""Conversations, rendered with the chat templates of tokenizers.

conversations     formats of conversations
rendering         conversations to text and to ids
tokens            ids in which no character of a user becomes part of a control token
template_process  starts the process that renders templates and communicates with it
template_worker   the code of this process
template_sandbox  the Jinja environment of templates
template_text     strings that record which characters a user wrote
"""
