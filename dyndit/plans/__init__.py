"""Routers write a plan for (timesteps, guidance, budget)."""

from dyndit.plans.schedules import constant, guidance_interval, ramp, reversed_plan, switch
from dyndit.plans.search import ShiftTable, search

__all__ = ["ShiftTable", "constant", "guidance_interval", "ramp", "reversed_plan", "search", "switch"]
