-- Note what is in hand alone. Only the owner of the epoch does: a worker that was fenced, and does
-- not know it yet, would blame an entry that the owner never had in hand.
--
-- KEYS  meta
-- ARGV  epoch, note
-- Reply {'OK'}, {'FENCED', owner, epoch}, {'BACK', epoch} or {'LOST'}

local held = redis.call('HMGET', KEYS[1], 'epoch', 'owner')
if not held[1] then
  return {'LOST'}
end
if tonumber(held[1]) < tonumber(ARGV[1]) then
  return {'BACK', held[1]} -- Redis lost what it had: a promoted replica, a power cut
end
if held[1] ~= ARGV[1] then
  return {'FENCED', held[2] or '', held[1]}
end
redis.call('HSET', KEYS[1], 'suspect', ARGV[2])
return {'OK'}
