"""What do shared beginnings of prompts save?"""
