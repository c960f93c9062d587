"""deletion"""
